"""The tasks of the T5 and prompt tuning papers: rows to texts, and texts to scores."""
