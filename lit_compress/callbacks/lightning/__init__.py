"""What knows Lightning's insides: network calls, the run's clock, processes, weight averages."""
