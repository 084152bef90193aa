"""Search how much of each layer to keep, by trying it on slim copies; no Lightning."""
