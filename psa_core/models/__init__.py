"""Plain facts about the model families."""
