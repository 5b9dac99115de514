"""What is read from disk and written to it; each format is a module that knows no other."""
