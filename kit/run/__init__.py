"""Builds what a recipe names and starts the work: one module for each command."""
