"""Models of other libraries as run directories."""
