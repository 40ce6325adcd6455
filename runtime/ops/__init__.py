"""Operations on tensors that know no model: products, norms, dropout, copies, deferred work."""
