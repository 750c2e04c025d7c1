"""What the commands of data_generation are made of; they run as scripts, so their directory is where this is found."""
