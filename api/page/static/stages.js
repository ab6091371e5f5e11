// A plan and what was measured of it, as the list of stages that the ring and its table show.

/**
 * Stages in the order of the ring. `model` is a model of the state, or a planned one without
 * `stages`. `lost` has the names of devices that are gone.
 */
export function stagesOf(model, lost = new Set()) {
  const { plan } = model;
  const alone = plan.stages.length === 1;
  const stages = plan.stages.map((planned, index) => {
    const loaded = model.stages?.[index];
    const isLast = index === plan.stages.length - 1;
    const members = (planned.members ?? []).map((member, at) => ({
      device: member.device,
      share: plan.shares?.[member.device],
      predictedS: member.compute_s + member.sums_s,
      measuredS: loaded?.members?.[at]?.token_s ?? null,
      memoryBytes: member.memory_bytes,
      limitBytes: member.memory_limit_bytes,
      isLost: lost.has(member.device),
    }));
    const devices = members.length ? members.map((member) => member.device) : [planned.device];
    return {
      index,
      name: devices.join(" + "),
      devices,
      members,
      bits: planned.bits,
      blocks: plan.blocks.slice(planned.first, planned.first + planned.bits.length),
      memoryBytes: planned.memory_bytes,
      limitBytes: planned.memory_limit_bytes,
      predictedS: planned.compute_s,
      // A team's devices are measured without their waits, so their stage as a whole is not.
      measuredS: members.length ? null : (loaded?.pass_s ?? loaded?.token_s ?? null),
      isLost: devices.some((device) => lost.has(device)),
      hop: alone
        ? null
        : {
            target: plan.stages[isLast ? 0 : index + 1].device,
            isReturn: isLast,
            bits: isLast ? null : planned.hop_bits,
            predictedS: isLast ? plan.return_s : plan.hops[index].seconds,
            measuredS: loaded?.hop_s ?? null,
          },
    };
  });
  markBottleneck(stages);
  return stages;
}

/** Mark the stage that takes longest together with the hop behind it. A broken ring has none. */
function markBottleneck(stages) {
  if (stages.length < 2 || stages.some((stage) => stage.isLost)) return;
  const isMeasured = stages.every((stage) => stage.measuredS !== null);
  const total = (stage) =>
    (isMeasured ? stage.measuredS : stage.predictedS) +
    (stage.hop.measuredS ?? stage.hop.predictedS);
  const slowest = stages.reduce((one, other) => (total(other) > total(one) ? other : one));
  slowest.bottleneck = isMeasured ? "measured" : "predicted";
}

/** The widths in a plan, ascending. */
export function widthsOf(stages) {
  return [...new Set(stages.flatMap((stage) => stage.bits))].sort((a, b) => a - b);
}

/** The widths that have a colour. Others take that of the next wider one. */
const COLOURED = [2, 3, 4, 5, 6, 8, 10, 12, 16, 32];

/** The class that colours a block of so many bits. */
export function bitsClass(bits) {
  return `bits-${COLOURED.find((width) => width >= bits) ?? 32}`;
}
