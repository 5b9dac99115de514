"""One frozen model that answers for every task at once: a prompt per row of each batch."""
