"""How good the samples are (Frechet distance, class accuracy, diversity), and the report a person reads."""
