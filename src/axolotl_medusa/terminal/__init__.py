"""What the decoding commands show: answers, chat, and plain beside Medusa decoding."""
