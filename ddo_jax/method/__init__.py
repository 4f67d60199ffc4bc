"""The paper in one box: objectives, negatives and the families they act on."""
