"""What fewer bits do to what a model says, measured."""
