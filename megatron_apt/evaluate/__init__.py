"""How good samples are: Frechet distance, class accuracy, diversity."""
