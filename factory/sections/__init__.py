"""The parts of a recipe, each checked by a pydantic model; `factory/recipe.py` puts them together."""
