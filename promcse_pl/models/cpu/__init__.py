"""Fast computation with the frozen encoder on CPUs: chunks in threads, dropout, fused layers. May import what models may."""
