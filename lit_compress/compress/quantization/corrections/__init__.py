"""What makes up for few bits in a network that is quantized after training."""
