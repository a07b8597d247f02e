"""What is done with models that are finished: answers for new text, a look inside, a comparison."""
