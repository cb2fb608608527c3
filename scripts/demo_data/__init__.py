"""What generated the demos' data: skills in words, questions about pictures, and the pictures themselves."""
