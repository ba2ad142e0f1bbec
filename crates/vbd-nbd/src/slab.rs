//! Values by number, with the numbers used again.

/// A list whose places are free again when their value was taken.
pub(crate) struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { places: Vec::new(), free: Vec::new() }
    }
}

const THERE: &str = "a number is used until its value was taken";

impl<T> Slab<T> {
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(crate) fn put(&mut self, value: T) -> u32 {
        if let Some(number) = self.free.pop() {
            self.places[number as usize] = Some(value);
            return number;
        }
        self.places.push(Some(value));
        u32::try_from(self.places.len() - 1).expect("bounded by the most commands of a client")
    }

    pub(crate) fn get(&mut self, number: u32) -> &mut T {
        self.places[number as usize].as_mut().expect(THERE)
    }

    pub(crate) fn take(&mut self, number: u32) -> T {
        let value = self.places[number as usize].take().expect(THERE);
        self.free.push(number);
        value
    }
}
