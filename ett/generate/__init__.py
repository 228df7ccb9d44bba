"""What a trained model makes: answers and reconstructions."""
