"""From a request to a running deployment, and back to one after a loss."""
