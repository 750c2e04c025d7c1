"""What heads are worth on a machine: accuracies, acceptance lengths, step times, the fastest tree, plots."""
