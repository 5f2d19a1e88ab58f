"""The service that reads signs from photos: requests, limits, the page, the model it follows."""
