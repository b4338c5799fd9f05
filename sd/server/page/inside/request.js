// The request that is looked at: the one of the form, with what was changed here.

const STEPS = 20; // without a few-step LoRA

export function copied(body) {
  return { ...body, loras: [...(body.loras ?? [])], request: { ...body.request, params: { ...body.request?.params } } };
}

const named = (lora, few) => lora.name.toLowerCase() === few.lora.toLowerCase();

export function isFew(body, few) {
  return Boolean(few) && (body.loras ?? []).some((lora) => named(lora, few));
}

// With or without the few-step LoRA of the model. Each has settings of its own.
export function withFew(body, few, on) {
  const found = copied(body);
  const { params } = found.request;
  found.loras = found.loras.filter((lora) => !named(lora, few));
  params.options = {};
  if (on) {
    found.loras.push({ name: few.lora, weight: 1 });
    Object.assign(params, { steps: few.steps, guidance: few.guidance, sampler: few.sampler, spacing: few.spacing });
  } else {
    Object.assign(params, { steps: STEPS, guidance: null, sampler: null, spacing: null });
  }
  return found;
}

// The body to send. own: {steps, guidance, few, seed}, each undefined where the form decides.
export function bodyFor(form, own, few) {
  let found = copied(form);
  delete found.previews;
  if (few && own.few !== undefined && own.few !== isFew(found, few)) found = withFew(found, few, own.few);
  const { params } = found.request;
  params.n = 1;
  for (const name of ["steps", "guidance", "seed"]) if (own[name] !== undefined) params[name] = own[name];
  return found;
}
