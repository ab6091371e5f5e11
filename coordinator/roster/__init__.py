"""The devices that have joined, what they are called, and what they measured."""
