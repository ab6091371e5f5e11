"""Testbeds that are described instead of measured."""
