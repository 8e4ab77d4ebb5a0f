"""What a run would need and cost, before a cluster is booked."""
