"""One engine a bundle: requests with priority and deadline, batches, worker processes, results in order."""
