"""What prompts have to do with each other and with models: similarity, recycling."""
