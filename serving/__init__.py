"""What serve.py serves by: the engine that has the model, and the protocol that programs speak to it."""
