//! A stream on one link: alone, beside idle channels of other processes, and beside as many of the process that
//! sends, in turn.

use super::{
    Extent,
    broker::BrokerProcess,
    crowd::{Crowd, Crowds},
    fan::{run, terms},
    figure::{Figure, Subject, Unit},
};
use crate::{
    Result, table,
    terms::{Mode, Terms, Wait, Work},
};

/// What is streamed.
const STREAMS: [(usize, Mode); 2] = [(64, Mode::Untouched), (4 << 10, Mode::Touched)];

pub(super) fn measure(extent: Extent) -> Result<Vec<Figure>> {
    let broker = BrokerProcess::start(None)?;
    let nobody = broker.holdings()?.descriptors;
    let channels = extent.clients;
    let settings = ["nothing".to_owned(), format!("{channels} of others"), format!("{channels} of its own")];
    // By setting and stream, run by run.
    let mut rates = vec![[const { Vec::new() }; STREAMS.len()]; settings.len()];
    for number in 0..extent.runs {
        for step in 0..settings.len() {
            // Each setting comes first, second and last as often as the others.
            let setting = (number + step) % settings.len();
            let (mut crowds, mut own) = (None, None);
            match setting {
                1 => crowds.insert(Crowds::start(&broker.address)?).grow_to(channels)?,
                2 => own = Some(Crowd::of_one_client(&broker.address, channels)?),
                _ => {}
            }
            for (rates, &(size, mode)) in rates[setting].iter_mut().zip(&STREAMS) {
                let terms = terms(&broker.address, Work::Stream, 1, extent);
                rates.push(run(&Terms { size, mode, wait: Wait::Spin, slots: None, ..terms })?.0);
            }
            drop((crowds, own));
            broker.wait_until_left(nobody)?;
        }
    }
    let mut figures = Vec::new();
    for (setting, beside) in settings.iter().enumerate() {
        let beside = || (beside.clone(), if setting == 0 { 0 } else { channels });
        for (index, &(size, _)) in STREAMS.iter().enumerate() {
            let (alone, these) = (&rates[0][index], &rates[setting][index]);
            let size = table::bytes(size);
            figures.push(Figure::new(Subject::Idle, format!("{size}, messages/s"), beside(), Unit::PerSecond, these)?);
            let ratios: Vec<_> = these.iter().zip(alone).map(|(this, alone)| this / alone).collect();
            figures.push(Figure::new(Subject::Idle, format!("{size}, of alone"), beside(), Unit::Ratio, &ratios)?);
        }
    }
    Ok(figures)
}
