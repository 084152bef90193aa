"""Everything that depends on Lightning's insides: network calls, run clock, processes, averages."""
