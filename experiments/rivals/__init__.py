"""Every rival of DDO from one reference and one pool, at equal compute."""
