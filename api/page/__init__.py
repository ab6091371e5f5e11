"""The page at ``/``: its files, the state that it shows, and the line that joins a device."""
