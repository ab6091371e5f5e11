"""The devices that have joined, their names, and their measurements."""
