"""What any room may use: files that are whole or not there, no secrets, words for numbers."""
