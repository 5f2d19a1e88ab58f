"""How good a model is: numbers, checks, pictures, and one model beside another."""
