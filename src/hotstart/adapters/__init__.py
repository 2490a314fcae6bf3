"""One outside thing each; adapters implement the ports of the stages and do not know each other."""
