"""Weight clustering: k-means on one weight, and parameters that train with few distinct values."""
