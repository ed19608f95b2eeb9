"""Prior-data fitted networks: quality, throughput, and what they gain."""
