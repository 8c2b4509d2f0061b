"""Built-in plugins; each folder holds one, and none imports another."""
