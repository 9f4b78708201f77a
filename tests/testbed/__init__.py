"""Provision and run the real services that the tests use."""
