//! What a run will read from a store, before it runs: downloads, room and repeats by machine.
//!
//! The order of a run is known, and so is what its cache of chunks does with it: this plays both
//! over the index alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lacuna_recipe::order::{ChunkSteps, EpochOrder, OrderSpec};
use lacuna_recipe::step::Geometry;
use lacuna_types::{SampleId, Slot, Step};

use crate::index::Index;
use crate::{OnProgress, Progress};

/// A cluster and its caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimulateConfig {
    /// Machines, each with a cache of its own.
    pub nodes: u32,
    /// Workers of a machine.
    pub workers_per_node: u32,
    /// Epochs to play.
    pub epochs: u32,
    /// Most bytes of chunks that a machine keeps.
    pub cache_bytes: u64,
}

/// What one machine does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeReport {
    /// Bytes downloaded in each epoch.
    pub downloaded: Vec<u64>,
    /// Chunks downloaded in each epoch.
    pub downloads: Vec<u64>,
    /// Chunks removed for others, over all epochs.
    pub evictions: u64,
    /// Most bytes of chunks that were in use at a time: begun in an epoch, and needed again in it.
    pub in_use_max: u64,
    /// Most bytes of chunks that were kept.
    pub kept_max: u64,
}

/// One machine while it is played.
struct Node {
    slots: Range<u32>,
    kept: BTreeMap<usize, u64>,
    bytes: u64,
    report: NodeReport,
    /// First and last step of the epoch that reads each chunk.
    spans: BTreeMap<usize, (u64, u64)>,
}

/// Plays a run.
///
/// # Panics
/// Where order and geometry do not fit the index, or a machine would get no slot.
pub fn simulate(
    index: &Index,
    order: &OrderSpec,
    geometry: Geometry,
    config: SimulateConfig,
    progress: OnProgress<'_>,
) -> Vec<NodeReport> {
    let n_slots = geometry.n_slots();
    let world = config.nodes * config.workers_per_node;
    assert!(world <= n_slots, "each worker has a slot");
    let first = |worker: u32| (u64::from(n_slots) * u64::from(worker) / u64::from(world)) as u32;
    let slots_of = |node: u32| {
        first(node * config.workers_per_node)..first((node + 1) * config.workers_per_node)
    };
    let mut nodes: Vec<Node> = (0..config.nodes).map(|node| Node::new(slots_of(node))).collect();
    let sizes: Vec<u64> = (0..index.n_chunks() as usize).map(|c| chunk_bytes(index, c)).collect();
    let n_steps = geometry.steps_per_epoch();
    let total = u64::from(config.epochs) * n_steps;
    for epoch in 0..config.epochs {
        let order_now = EpochOrder::new(order, epoch);
        let (now, then) = (ChunkSteps::new(order, epoch), ChunkSteps::new(order, epoch + 1));
        for node in &mut nodes {
            node.report.downloaded.push(0);
            node.report.downloads.push(0);
        }
        for step in 0..n_steps {
            // The epoch's own step counts: where it starts does not matter to what is needed next.
            let next_use = |chunk: usize| match now.next(chunk, step + 1) {
                Some(next) => next,
                None => n_steps + then.next(chunk, 0).unwrap_or(n_steps),
            };
            for node in &mut nodes {
                let needed = node.needed(index, &order_now, geometry, step);
                node.step(step, &needed, &sizes, config.cache_bytes, &next_use);
            }
            progress(Progress { done: u64::from(epoch) * n_steps + step + 1, total });
        }
        nodes.iter_mut().for_each(|node| node.end_epoch(&sizes));
    }
    nodes.into_iter().map(|node| node.report).collect()
}

/// Returns the bytes of a chunk's samples.
fn chunk_bytes(index: &Index, chunk: usize) -> u64 {
    let bounds = index.chunk_bounds();
    let bytes = |id| u64::from(index.record(SampleId(id)).bytes);
    (bounds[chunk]..bounds[chunk + 1]).map(bytes).sum()
}

impl Node {
    fn new(slots: Range<u32>) -> Self {
        let report = NodeReport::default();
        Node { slots, kept: BTreeMap::new(), bytes: 0, report, spans: BTreeMap::new() }
    }

    /// Returns the chunks that a step of the epoch reads here.
    fn needed(
        &self,
        index: &Index,
        order: &EpochOrder,
        geometry: Geometry,
        step: u64,
    ) -> BTreeSet<usize> {
        // Positions count within an epoch, and so does the step.
        let positions = |index| geometry.positions(Slot { step: Step(step), index });
        let range = match (self.slots.start, self.slots.end) {
            (start, end) if start < end => positions(start).start..positions(end - 1).end,
            _ => 0..0,
        };
        order.samples(range).into_iter().map(|id| index.chunk_of(id)).collect()
    }

    fn step(
        &mut self,
        step: u64,
        needed: &BTreeSet<usize>,
        sizes: &[u64],
        cache_bytes: u64,
        next_use: &dyn Fn(usize) -> u64,
    ) {
        for &chunk in needed {
            self.spans.entry(chunk).or_insert((step, step)).1 = step;
            if self.kept.contains_key(&chunk) {
                continue;
            }
            let size = sizes[chunk];
            *self.report.downloaded.last_mut().expect("an epoch began") += size;
            *self.report.downloads.last_mut().expect("an epoch began") += 1;
            if self.bytes + size > cache_bytes {
                self.evict(self.bytes + size - cache_bytes, needed, next_use);
            }
            if self.bytes + size <= cache_bytes {
                self.kept.insert(chunk, size);
                self.bytes += size;
                self.report.kept_max = self.report.kept_max.max(self.bytes);
            }
        }
    }

    /// Removes what is needed last, until `over` bytes are free; what this step needs goes last.
    fn evict(&mut self, over: u64, needed: &BTreeSet<usize>, next_use: &dyn Fn(usize) -> u64) {
        let rank = |chunk: &usize| if needed.contains(chunk) { 0 } else { 1 + next_use(*chunk) };
        let mut victims: Vec<(u64, usize)> = self.kept.keys().map(|c| (rank(c), *c)).collect();
        victims.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
        let mut freed = 0;
        for (_, chunk) in victims {
            if freed >= over {
                break;
            }
            freed += self.kept.remove(&chunk).unwrap_or(0);
            self.report.evictions += 1;
        }
        self.bytes -= freed;
    }

    /// Finds the most that was in use at a time.
    fn end_epoch(&mut self, sizes: &[u64]) {
        let mut changes: BTreeMap<u64, i128> = BTreeMap::new();
        for (chunk, (from, to)) in std::mem::take(&mut self.spans) {
            let size = i128::from(sizes[chunk]);
            *changes.entry(from).or_default() += size;
            *changes.entry(to + 1).or_default() -= size;
        }
        let mut in_use: i128 = 0;
        for change in changes.into_values() {
            in_use += change;
            self.report.in_use_max = self.report.in_use_max.max(in_use as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use lacuna_recipe::order::{OrderMode, OrderParams};

    use super::*;
    use crate::fixtures::synthetic;

    fn play(mode: OrderMode, nodes: u32, cache_bytes: u64) -> (Vec<NodeReport>, u64, u64) {
        let folder = tempfile::tempdir().unwrap();
        let dataset = synthetic(folder.path(), 400, 28, 3);
        let index = dataset.index();
        let order = dataset.order_spec(OrderParams { mode, lanes: 2, block: 30 }, 3, 32);
        let geometry = Geometry { n_samples: 400, batch: 32, slot_batch: 8 };
        let config = SimulateConfig { nodes, workers_per_node: 2, epochs: 3, cache_bytes };
        let reports = simulate(index, &order, geometry, config, &mut |_| {});
        let all = (0..index.n_chunks() as usize).map(|chunk| chunk_bytes(index, chunk)).sum();
        (reports, all, index.n_chunks())
    }

    /// With room for everything, each chunk comes once, and only what an epoch dropped comes later.
    #[test]
    fn room_for_everything_downloads_everything_once() {
        for mode in [OrderMode::Block, OrderMode::Global, OrderMode::Sequential] {
            let (reports, all, n_chunks) = play(mode, 1, u64::MAX);
            let [report] = &reports[..] else { panic!("one node") };
            assert!(report.downloads.iter().sum::<u64>() <= n_chunks);
            assert!(report.downloads[0] + 2 >= n_chunks, "{report:?}");
            assert!(report.kept_max <= all && report.evictions == 0);
            let near = mode != OrderMode::Global;
            assert_eq!(report.in_use_max < all * 3 / 4, near, "{mode:?} {report:?} of {all}");
        }
    }

    /// With less room than what is in use chunks come again; lanes of machines are few, so two read
    /// little more than one.
    #[test]
    fn machines_read_their_lanes_and_small_caches_repeat() {
        let (one, all, _) = play(OrderMode::Block, 1, u64::MAX);
        let (two, ..) = play(OrderMode::Block, 2, u64::MAX);
        let first: u64 = two.iter().map(|node| node.downloaded[0]).sum();
        assert!(first >= one[0].downloaded[0] && first < all * 3 / 2, "{first} of {all}");
        let (small, ..) = play(OrderMode::Block, 1, one[0].in_use_max / 3);
        assert!(small[0].downloaded[0] > all && small[0].evictions > 0, "{small:?} of {all}");
        let (enough, ..) = play(OrderMode::Block, 1, one[0].in_use_max + one[0].in_use_max / 4);
        assert!(enough[0].downloaded[0] <= all, "{enough:?} of {all}");
        // Belady's rule: something of an epoch serves the next one.
        assert!(enough[0].downloaded[1] < enough[0].downloaded[0], "{enough:?}");
    }
}
