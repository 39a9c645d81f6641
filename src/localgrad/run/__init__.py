"""Recipes, data, the training loop and the commands: the top floor."""
