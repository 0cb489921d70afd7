"""What makes each token of an answer: choosing it, the grammar it follows, the text it gives."""
