//! What is shown, from counts that were read: rates, order, filter, and what is chosen. Knows no terminal, no map and no
//! clock.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::inspect::{Label, UsageView};

/// Rates that are kept for the sparklines.
const HISTORY: usize = 60;

/// Counts of all Services at one time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sample {
    /// By any clock that does not go back.
    pub at: Duration,
    pub services: BTreeMap<u32, ServiceSample>,
}

/// Counts of one Service, or of the host ports of a Pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceSample {
    /// Whose they are; `None`: it has no name.
    pub label: Option<Label>,
    pub usage: UsageView,
}

/// Flows of one backend of a Service.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct BackendFlows {
    pub address: String,
    /// `active` or `terminating`; `none`: it is no backend any more.
    pub state: &'static str,
    pub pending: u64,
    pub established: u64,
    pub closing: u64,
    pub closed: u64,
}

impl BackendFlows {
    pub fn total(&self) -> u64 {
        self.pending + self.established + self.closing + self.closed
    }
}

/// Per second.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Rates {
    pub packets: f64,
    pub bytes: f64,
    pub connections: f64,
    pub drops: f64,
}

impl Rates {
    const fn of(&self, sort: Sort) -> f64 {
        match sort {
            Sort::Packets | Sort::Name => self.packets,
            Sort::Bytes => self.bytes,
            Sort::Connections => self.connections,
            Sort::Drops => self.drops,
        }
    }
}

/// What comes first.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sort {
    #[default]
    Packets,
    Bytes,
    Connections,
    Drops,
    Name,
}

impl Sort {
    pub const ALL: [Self; 5] = [Self::Packets, Self::Bytes, Self::Connections, Self::Drops, Self::Name];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Packets => "packets",
            Self::Bytes => "bytes",
            Self::Connections => "connections",
            Self::Drops => "drops",
            Self::Name => "name",
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::Packets => Self::Bytes,
            Self::Bytes => Self::Connections,
            Self::Connections => Self::Drops,
            Self::Drops => Self::Name,
            Self::Name => Self::Packets,
        }
    }
}

/// One Service.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    pub service: u32,
    pub name: String,
    label: Option<Label>,
    usage: UsageView,
    /// `None`: counted once only.
    pub rates: Option<Rates>,
    /// Packets per second, the newest last.
    pub history: VecDeque<u64>,
}

impl Row {
    pub fn totals(&self) -> UsageView {
        self.usage
    }

    pub fn label(&self) -> Option<&Label> {
        self.label.as_ref()
    }

    fn rate(&self, sort: Sort) -> f64 {
        self.rates.as_ref().map_or(0.0, |rates| rates.of(sort))
    }
}

/// What somebody pressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key {
    Char(char),
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    Enter,
    Escape,
    Backspace,
}

/// What is on the screen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum View {
    Services,
    /// Backends of this Service.
    Backends(u32),
}

/// Everything that is shown.
#[derive(Clone, PartialEq, Debug)]
pub struct Model {
    rows: BTreeMap<u32, Row>,
    last: Option<Duration>,
    pub sort: Sort,
    filter: String,
    /// Characters go into the filter.
    pub typing: bool,
    view: View,
    /// The row that is marked; it stays on its Service when the order changes.
    chosen: Option<u32>,
    backends: Vec<BackendFlows>,
    /// Why the last reading failed.
    pub trouble: Option<String>,
    pub quit: bool,
}

impl Model {
    pub fn new(sort: Sort, filter: String) -> Self {
        Self {
            rows: BTreeMap::new(),
            last: None,
            sort,
            filter,
            typing: false,
            view: View::Services,
            chosen: None,
            backends: vec![],
            trouble: None,
            quit: false,
        }
    }

    /// Takes counts that are newer than the last.
    pub fn take(&mut self, sample: Sample) {
        let seconds = self.last.map(|last| sample.at.saturating_sub(last).as_secs_f64());
        let seconds = seconds.filter(|seconds| *seconds > 0.0);
        let mut before = std::mem::take(&mut self.rows);
        for (service, now) in sample.services {
            // A number that was given to another Service is another row.
            let known = before.remove(&service).filter(|row| row.label == now.label);
            let mut history = known.as_ref().map(|row| row.history.clone()).unwrap_or_default();
            let rates = known.zip(seconds).map(|(row, seconds)| rates(&row.usage, &now.usage, seconds));
            if let Some(rates) = &rates {
                history.push_back(rounded(rates.packets));
            }
            while history.len() > HISTORY {
                history.pop_front();
            }
            let name = match &now.label {
                Some(label) => format!("{}/{}", label.namespace, label.name),
                None => format!("number {service}"),
            };
            let row = Row { service, name, label: now.label, usage: now.usage, rates, history };
            self.rows.insert(service, row);
        }
        self.last = Some(sample.at);
        if let View::Backends(service) = self.view
            && !self.rows.contains_key(&service)
        {
            self.view = View::Services;
        }
        self.trouble = None;
    }

    /// Takes the flows of the Service that is looked into.
    pub fn take_backends(&mut self, service: u32, mut backends: Vec<BackendFlows>) {
        if self.view == View::Backends(service) {
            backends.sort_by_key(|backend| (Reverse(backend.total()), backend.address.clone()));
            self.backends = backends;
        }
    }

    pub fn view(&self) -> View {
        self.view
    }

    pub fn filter(&self) -> &str {
        &self.filter
    }

    pub fn backends(&self) -> &[BackendFlows] {
        &self.backends
    }

    /// The Service that is looked into.
    pub fn looked_into(&self) -> Option<&Row> {
        match self.view {
            View::Backends(service) => self.rows.get(&service),
            View::Services => None,
        }
    }

    /// Those that pass the filter, in their order.
    pub fn rows(&self) -> Vec<&Row> {
        let mut rows: Vec<&Row> = self.rows.values().filter(|row| row.name.contains(&self.filter)).collect();
        rows.sort_by(|a, b| {
            let by_rate = match self.sort {
                Sort::Name => Ordering::Equal,
                sort => b.rate(sort).total_cmp(&a.rate(sort)),
            };
            by_rate.then_with(|| a.name.cmp(&b.name)).then(a.service.cmp(&b.service))
        });
        rows
    }

    /// Of all of them, also those that are not shown.
    pub fn total(&self) -> Rates {
        let rates = self.rows.values().filter_map(|row| row.rates.as_ref());
        rates.fold(Rates::default(), |sum, rates| Rates {
            packets: sum.packets + rates.packets,
            bytes: sum.bytes + rates.bytes,
            connections: sum.connections + rates.connections,
            drops: sum.drops + rates.drops,
        })
    }

    /// Place of the marked one among [`Model::rows`].
    pub fn chosen(&self, rows: &[&Row]) -> usize {
        rows.iter().position(|row| Some(row.service) == self.chosen).unwrap_or(0)
    }

    /// `page`: rows on the screen.
    pub fn press(&mut self, key: Key, page: usize) {
        if self.typing {
            return self.type_in(key);
        }
        match key {
            Key::Char('q') => self.quit = true,
            Key::Char('/') => self.typing = true,
            Key::Char('s') => self.sort = self.sort.next(),
            Key::Char('p') => self.sort = Sort::Packets,
            Key::Char('b') => self.sort = Sort::Bytes,
            Key::Char('c') => self.sort = Sort::Connections,
            Key::Char('d') => self.sort = Sort::Drops,
            Key::Char('n') => self.sort = Sort::Name,
            Key::Up | Key::Char('k') => self.choose(|at| at.saturating_sub(1)),
            Key::Down | Key::Char('j') => self.choose(|at| at + 1),
            Key::PageUp => self.choose(|at| at.saturating_sub(page.max(1))),
            Key::PageDown => self.choose(|at| at + page.max(1)),
            Key::Home => self.choose(|_| 0),
            Key::End => self.choose(|_| usize::MAX),
            Key::Enter => self.look_into(),
            Key::Escape | Key::Backspace => self.back(),
            Key::Char(_) => {}
        }
    }

    fn type_in(&mut self, key: Key) {
        match key {
            Key::Char(c) if !c.is_control() => self.filter.push(c),
            Key::Backspace => drop(self.filter.pop()),
            Key::Enter => self.typing = false,
            Key::Escape => {
                self.filter.clear();
                self.typing = false;
            }
            _ => {}
        }
    }

    fn choose(&mut self, to: impl FnOnce(usize) -> usize) {
        let rows = self.rows();
        let Some(last) = rows.len().checked_sub(1) else { return };
        self.chosen = rows.get(to(self.chosen(&rows)).min(last)).map(|row| row.service);
    }

    fn look_into(&mut self) {
        let rows = self.rows();
        let Some(service) = rows.get(self.chosen(&rows)).map(|row| row.service) else { return };
        if self.view == View::Services {
            self.chosen = Some(service);
            self.view = View::Backends(service);
            self.backends.clear();
        }
    }

    fn back(&mut self) {
        match self.view {
            View::Backends(_) => self.view = View::Services,
            View::Services => self.filter.clear(),
        }
    }
}

fn rates(before: &UsageView, now: &UsageView, seconds: f64) -> Rates {
    #[expect(clippy::cast_precision_loss, reason = "rates are approximate")]
    let per_second = |count: fn(&UsageView) -> u64| delta(count(before), count(now)) as f64 / seconds;
    Rates {
        packets: per_second(|usage| usage.packets),
        bytes: per_second(|usage| usage.bytes),
        connections: per_second(|usage| usage.connections),
        drops: per_second(|usage| usage.refused),
    }
}

/// What came between two counts. A count that went back was reset, and is what came since; unless it was in its last
/// half and is in its first: then it has wrapped.
fn delta(before: u64, now: u64) -> u64 {
    const HALF: u64 = 1 << 63;
    match now.checked_sub(before) {
        Some(delta) => delta,
        None if before >= HALF && now < HALF && now.wrapping_sub(before) < HALF => now.wrapping_sub(before),
        None => now,
    }
}

/// For sparklines.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are positive and far below 2^53"
)]
fn rounded(rate: f64) -> u64 {
    rate.round() as u64
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::top) fn usage(packets: u64, bytes: u64, connections: u64, refused: u64) -> UsageView {
        UsageView { connections, packets, bytes, refused }
    }

    pub(in crate::top) fn sample(seconds: u64, services: &[(u32, &str, UsageView)]) -> Sample {
        let services = services.iter().map(|(service, name, usage)| {
            let label = Label { owner: "Service", namespace: "shop".into(), name: (*name).into() };
            (*service, ServiceSample { label: Some(label), usage: *usage })
        });
        Sample { at: Duration::from_secs(seconds), services: services.collect() }
    }

    /// Two samples, two seconds apart: `a` is the one with packets, `b` with bytes, `c` with drops.
    pub(in crate::top) fn three() -> Model {
        let mut model = Model::new(Sort::Packets, String::new());
        let zero = usage(0, 0, 0, 0);
        model.take(sample(10, &[(1, "a", zero), (2, "b", zero), (3, "c", zero)]));
        let [a, b, c] = [usage(2000, 3000, 4, 0), usage(20, 9_000_000, 6, 0), usage(0, 0, 0, 50)];
        model.take(sample(12, &[(1, "a", a), (2, "b", b), (3, "c", c)]));
        model
    }

    fn names(model: &Model) -> String {
        model.rows().iter().map(|row| row.name.trim_start_matches("shop/")).collect()
    }

    fn packets(model: &Model, service: u32) -> Option<f64> {
        model.rows[&service].rates.map(|rates| rates.packets)
    }

    #[test]
    fn rates_are_per_second_whatever_the_interval() {
        let model = three();
        let rates = model.rows[&1].rates.unwrap();
        assert_eq!(rates, Rates { packets: 1000.0, bytes: 1500.0, connections: 2.0, drops: 0.0 });
        let total = Rates { packets: 1010.0, bytes: 4_501_500.0, connections: 5.0, drops: 25.0 };
        assert_eq!(model.total(), total);
        assert_eq!(model.rows[&1].history, [1000]);
    }

    #[test]
    fn the_first_sight_has_no_rate() {
        let mut model = Model::new(Sort::Packets, String::new());
        model.take(sample(1, &[(1, "a", usage(500, 0, 0, 0))]));
        assert_eq!(packets(&model, 1), None);
        model.take(sample(2, &[(1, "a", usage(500, 0, 0, 0)), (2, "b", usage(900, 0, 0, 0))]));
        assert_eq!((packets(&model, 1), packets(&model, 2)), (Some(0.0), None));
        // Twice at the same time: no division by zero.
        model.take(sample(2, &[(1, "a", usage(600, 0, 0, 0))]));
        assert_eq!(packets(&model, 1), None);
    }

    #[test]
    fn counters_that_are_reset_or_wrap_give_no_nonsense() {
        let after = |before, now| {
            let mut model = Model::new(Sort::Packets, String::new());
            model.take(sample(1, &[(1, "a", usage(before, 0, 0, 0))]));
            model.take(sample(2, &[(1, "a", usage(now, 0, 0, 0))]));
            packets(&model, 1)
        };
        assert_eq!(after(5000, 7), Some(7.0), "reset");
        assert_eq!(after(5000, 0), Some(0.0), "reset, and nothing since");
        assert_eq!(after(u64::MAX - 9, 10), Some(20.0), "wrapped");
        assert_eq!(after(u64::MAX, u64::MAX), Some(0.0));
    }

    #[test]
    fn a_number_that_another_service_has_now_begins_anew() {
        let mut model = three();
        model.take(sample(13, &[(1, "new", usage(5, 0, 0, 0))]));
        assert_eq!(packets(&model, 1), None);
        assert!(model.rows[&1].history.is_empty());
        assert_eq!(model.rows.len(), 1, "those that are gone are not shown");
    }

    #[test]
    fn the_order_is_what_was_asked_for() {
        let mut model = three();
        let mut orders = vec![names(&model)];
        for key in "bcdns".chars() {
            model.press(Key::Char(key), 10);
            orders.push(names(&model));
        }
        assert_eq!(orders, ["abc", "bac", "bac", "cab", "abc", "abc"]);
        assert_eq!(model.sort, Sort::Packets, "after the last comes the first");
    }

    #[test]
    fn the_filter_is_typed_and_taken_back() {
        let mut model = three();
        for key in "/p/b".chars() {
            model.press(Key::Char(key), 10);
        }
        assert_eq!((model.filter(), names(&model).as_str(), model.typing), ("p/b", "b", true));
        model.press(Key::Char('q'), 10);
        assert!(!model.quit && model.rows().is_empty());
        model.press(Key::Enter, 10);
        assert_eq!(model.view(), View::Services, "Enter ends typing");
        model.press(Key::Enter, 10);
        assert_eq!(model.view(), View::Services, "there is nothing to look into");
        model.press(Key::Escape, 10);
        assert_eq!((model.filter(), names(&model).as_str()), ("", "abc"));
        model.press(Key::Char('/'), 10);
        model.press(Key::Char('x'), 10);
        model.press(Key::Backspace, 10);
        model.press(Key::Backspace, 10);
        assert_eq!(model.filter(), "");
        model.press(Key::Escape, 10);
        model.press(Key::Char('q'), 10);
        assert!(model.quit);
    }

    #[test]
    fn the_mark_stays_on_its_service() {
        let mut model = three();
        let at = |model: &Model| model.chosen(&model.rows());
        model.press(Key::Down, 10);
        assert_eq!(at(&model), 1);
        model.press(Key::Char('b'), 10);
        assert_eq!(at(&model), 0, "b is the first by bytes");
        for (key, place) in [
            (Key::End, 2),
            (Key::Down, 2),
            (Key::PageUp, 0),
            (Key::PageDown, 2),
            (Key::Home, 0),
            (Key::Up, 0),
        ] {
            model.press(key, 10);
            assert_eq!(at(&model), place, "{key:?}");
        }
    }

    #[test]
    fn a_service_is_looked_into_and_left_again() {
        let mut model = three();
        model.press(Key::Down, 10);
        model.press(Key::Enter, 10);
        assert_eq!(model.view(), View::Backends(2));
        assert_eq!(model.looked_into().unwrap().name, "shop/b");
        let flows = |address: &str, established| BackendFlows {
            address: address.into(),
            established,
            ..BackendFlows::default()
        };
        model.take_backends(1, vec![flows("10.0.0.9:1", 1)]);
        assert!(model.backends().is_empty(), "of another Service");
        model.take_backends(2, vec![flows("10.0.0.1:1", 1), flows("10.0.0.2:1", 5), flows("10.0.0.0:1", 1)]);
        let order: Vec<_> = model.backends().iter().map(|backend| backend.address.as_str()).collect();
        assert_eq!(order, ["10.0.0.2:1", "10.0.0.0:1", "10.0.0.1:1"]);
        model.press(Key::Escape, 10);
        assert_eq!(model.view(), View::Services);
        // It is deleted while somebody looks into it.
        model.press(Key::Enter, 10);
        model.take(sample(14, &[(1, "a", usage(0, 0, 0, 0))]));
        assert_eq!(model.view(), View::Services);
    }

    #[test]
    fn the_history_is_bounded() {
        let mut model = Model::new(Sort::Packets, String::new());
        for second in 0..200 {
            model.take(sample(second, &[(1, "a", usage(second * second, 0, 0, 0))]));
        }
        assert_eq!(model.rows[&1].history.len(), HISTORY);
        assert_eq!(model.rows[&1].history.back(), Some(&397));
    }
}
