"""From a prompt to text: sequence, embeddings, decoding with a prefix cache, sampling."""
