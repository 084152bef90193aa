"""Finding out how much of a model can go, by trying it on slim copies; no Lightning."""
