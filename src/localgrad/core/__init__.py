"""The step and its parts: nothing here knows data sets, files or run folders."""
