"""The page of a run, its figures, and the images that a round leaves for it."""
