"""Other programs' files, read and written without running any of them."""
