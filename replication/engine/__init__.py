"""What makes training fast, exact and safe: nobody needs to read it to use the rest."""
